"""Trained models behind an HTTP server that clients of OpenAI's chat API can ask."""
