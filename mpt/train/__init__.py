"""Training: how a run is started, built, stepped and looped."""
