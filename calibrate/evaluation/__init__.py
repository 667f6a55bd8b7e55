"""What methods cost in quality and save in bytes: the protocol, its prompts, and how results are kept and shown."""
