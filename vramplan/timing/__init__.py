"""How long a step takes on a card, and what training costs."""
