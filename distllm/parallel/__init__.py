"""Who owns which slice: rank layout, sharding arithmetic, and the layers that join the slices again."""
