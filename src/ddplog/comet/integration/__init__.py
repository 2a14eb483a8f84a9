"""Comet's integrations that scripts import from; those that are not here say so when they are imported."""
