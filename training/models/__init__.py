"""Networks in plain torch: `dit` (the papers' transformer), `codec` (targets to latents), `perceiver` (the default).

Nothing here needs more than torch and NumPy.
"""
