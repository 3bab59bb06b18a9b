"""Requests in, text out."""

# Whoever imports transformers first decides whether it advises to install torch: here, before anybody else.
from converters import advice as advice
