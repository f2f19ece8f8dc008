"""The largest of few, as routers choose experts: a part of captured tokens, not a kernel."""
