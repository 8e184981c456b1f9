"""The engines that run components, one file each; `medgemma_runtime.session` opens them."""
