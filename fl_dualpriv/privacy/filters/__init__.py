"""Filters of an owner's lifetime budget: three proved rules that admit or refuse a release before it is made."""
