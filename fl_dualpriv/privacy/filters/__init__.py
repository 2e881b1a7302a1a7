"""Privacy filters of an owner's lifetime budget: three proved rules that admit or refuse a release beforehand."""
