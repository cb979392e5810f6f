"""What a policy does to the predictions of a model on a text."""
