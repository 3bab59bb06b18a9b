"""Configs of well known models, from their public repos: facts about shapes, no weights."""
