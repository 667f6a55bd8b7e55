"""Methods: each is read in one file. What the user sets, what is kept beside keys and values, how a step attends."""
