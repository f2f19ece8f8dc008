"""Random steps against the guarantees: exact, reversible, honest.

Everything is done twice: to a model of transformers' own classes, which the package patches, and
to a twin whose classes come from a second copy of the modelling module, which no table names. What
a user does (hooks, wrappers, copies, replaced helpers) is done to both, what this package does to
the first alone; so results, calls of the user's own functions and errors have to be the same.
"""
