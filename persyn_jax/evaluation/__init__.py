"""Tasks and their verifiers: where prompts come from and how an answer to one is scored."""
