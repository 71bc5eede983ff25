"""Writes report.html: all that is known of one run, or of several side by side, in one file.

The page holds no script and asks for nothing from outside: pictures lie in it, and its policy
forbids everything else. Whatever comes from data or files is escaped by `markup`.
"""
