"""What a fine-tuned model is, and where it lives."""
