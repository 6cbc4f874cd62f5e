"""Networks, in plain torch: `dit` (the transformer of the papers), `codec` (targets to latents), `perceiver` (the default).

Nothing here needs more than torch and NumPy.
"""
