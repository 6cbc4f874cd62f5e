"""The manifests against the code and the images that they run; `k8s/validate` has the checks that need more."""
