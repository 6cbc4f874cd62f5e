"""Networks in plain torch: `dit` (the papers' family; `moe`, `routing`, `affiner`, `growth` are its ideas), `perceiver`
(the default model), `codec` (targets to latents). Nothing here needs more than torch and NumPy.
"""
