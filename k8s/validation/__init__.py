"""Checks of the manifests: rendering, schemas, alert rules, and a real API server. `k8s/validate` runs them."""
