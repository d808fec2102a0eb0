"""Public tests of language models: items, the prompts that their protocols make, and how answers are judged."""
