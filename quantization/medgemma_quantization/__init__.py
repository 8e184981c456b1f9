"""Decides and computes the integers and scales that every deployment target carries."""
