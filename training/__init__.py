"""The training wing: models, generated scenes, training, export to model_repository/, evaluation.

Stands on `saccade`; never imports `server`. Models and scenes need torch and NumPy alone.
"""
