"""Code that a rule nearly knows and has to leave alone: the line and the reason stand in it.

``# <- reason`` marks the line that the reason names, ``# <~ reason`` stands where it names none.
"""
