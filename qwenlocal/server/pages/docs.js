// Lists the operations of /openapi.json. All texts are set as text, never as HTML.
"use strict";

function element(name, text, ...children) {
  const node = document.createElement(name);
  if (text) node.textContent = text;
  node.append(...children);
  return node;
}

function typeName(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  const choices = schema.anyOf || schema.oneOf;
  if (choices) return choices.map(typeName).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.type === "array") return `${schema.items ? typeName(schema.items) : "any"}[]`;
  return schema.type || "any";
}

function fieldTable(schema) {
  const rows = Object.entries(schema.properties || {}).map(([name, field]) => {
    const needed = (schema.required || []).includes(name) ? "required" : "";
    return element("tr", "", element("td", "", element("code", name)), element("td", typeName(field)), element("td", needed));
  });
  return element("table", "", element("tbody", "", ...rows));
}

function operation(method, path, details, schemas) {
  const title = element("span", method.toUpperCase());
  title.className = "method";
  const section = element("details", "", element("summary", "", title, element("code", path)), element("p", details.description || ""));
  const schema = details.requestBody?.content?.["application/json"]?.schema;
  if (schema?.$ref) section.append(fieldTable(schemas[schema.$ref.split("/").pop()]));
  return section;
}

async function show() {
  const main = document.getElementById("operations");
  const response = await fetch("/openapi.json");
  if (!response.ok) {
    main.replaceChildren(element("p", `The description cannot be loaded: ${response.status}.`));
    return;
  }
  const description = await response.json();
  const groups = new Map();
  for (const [path, methods] of Object.entries(description.paths)) {
    for (const [method, details] of Object.entries(methods)) {
      const tag = details.tags?.[0] || "Other";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(operation(method, path, details, description.components.schemas));
    }
  }
  main.replaceChildren(...[...groups].map(([tag, operations]) => element("section", "", element("h2", tag), ...operations)));
}

show();
