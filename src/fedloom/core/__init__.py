"""What every layer shares: protocols, arithmetic on Params, seeds. Imports torch and the standard library only."""
