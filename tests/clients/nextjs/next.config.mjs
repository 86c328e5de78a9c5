// The packages lie in the folder above.
export default { turbopack: { root: `${import.meta.dirname}/..` } };
