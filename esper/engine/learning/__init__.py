"""How branches learn: their objectives before they are blended in, their optimizer, and the loss as users have it."""
