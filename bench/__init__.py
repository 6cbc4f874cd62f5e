"""Every published number comes from a script here. Each prints a Markdown table and says what machine it ran on."""
