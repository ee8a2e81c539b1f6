"""Five defects, each seeded into a copy of the sources, each of which must turn the suite red.

`mutants` lists them; ``test_kept.py`` holds the deterministic tests that they break; ``test_mutants.py`` runs these
against each mutant and expects failure, and for what shows at a sink the kill test with its black-box oracle as well.
"""
