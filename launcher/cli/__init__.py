"""The command `halfstep VERB`: one module a family of verbs, which reads its words and calls what does the work."""
