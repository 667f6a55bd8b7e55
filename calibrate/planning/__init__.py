"""Spend a budget of bytes where it buys most: settings by layer, from the attention error that each of them makes."""
