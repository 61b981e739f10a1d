"""Other libraries' registries of models: `import vggfast.integrations.timm`, or `.torchvision`, adds vggfast's VGGs to them."""
