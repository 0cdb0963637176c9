"""Reading a run: what each layer already predicts, what wrote the answer, and what each head does."""
