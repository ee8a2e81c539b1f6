"""Kill -9 at random moments under load; see `scenario`. ``bench/kills.py`` runs the same with as many as one likes."""
