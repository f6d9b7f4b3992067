"""Text: cleaning captions and questions, normalizing answers, the tokenizer."""
