"""Localisation, faithfulness and similarity metrics; each value travels with its protocol."""
