"""SmolLM2-135M as a looped model; see README.md."""
