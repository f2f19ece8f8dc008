"""``include="measured"``: the first steps of a run are timed with each op in and out.

``comparing.py`` tells whether one kind of step is faster than another, ``schedule.py`` which kind
comes next and what follows from their times: both know times alone. ``models.py`` tells what a
choice depends on, ``cache.py`` keeps it, ``choice.py`` says it in words. ``run.py`` is one model in
one mode, ``measurement.py`` all that one patch measures, ``optimizers.py`` how it learns of steps.
"""
