"""Reading runs, holding them against published curves, and showing them."""
