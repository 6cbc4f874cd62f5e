"""The page at `/`: plain files, no build step, nothing from another host."""
