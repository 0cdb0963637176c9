"""Views in a notebook or on a page: arrays and strings in, what is selected out. No view knows the model."""
