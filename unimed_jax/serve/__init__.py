"""Serves a model to browsers and programs; nothing of a request is kept (docs/serving.md)."""
