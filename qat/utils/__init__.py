"""Helpers for files, text and checks that every part of the package may use."""
