"""Scoring of image sets with Ray Data and an HTTP service with Ray Serve."""
