"""Boolean expressions: eligibility rules and triggers."""
