"""``include="measured"``: the first steps of a run are timed with each op in and out.

``comparing.py`` tells whether one kind of step is faster than another, ``schedule.py`` which kind
comes next and what follows from their times: both know times alone. ``choice.py`` says that in
words, ``cache.py`` keeps it, ``models.py`` tells what it depends on. ``run.py`` is one model in one
mode, ``owners.py`` finds it for a call, ``calls.py`` reads the call, ``optimizers.py`` hears of
steps. ``measurement.py`` puts them together for one patch; ``lines.py`` is what it logs.
"""
