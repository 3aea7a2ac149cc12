"""The attention layer, the other layers that can stand in a block's place, and their operator."""
