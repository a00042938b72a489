"""Where images come from and downloads go: one module per scheme, and the policy that says what may be fetched."""
