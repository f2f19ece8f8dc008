"""The linear layers of one decoded token: few rows, several layers of one input in one launch.

No kernel of its own id: what captures a token in a graph calls it.
"""
