"""Configs: each file's docstring holds its command, and the number to expect where one was measured."""
