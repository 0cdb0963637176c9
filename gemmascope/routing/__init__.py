"""Router analysis: what the experts do, and whether it matters."""
